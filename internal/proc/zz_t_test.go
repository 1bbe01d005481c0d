package proc
import ("testing";"fmt")
func TestZZT(t *testing.T) {
	r := newRig(t)
	for range 30 {
	c, f, s := r.terminal("run", "cat")
	f.WriteString("hello\n")
	until(t, "echo and line", s.has("hello\r\nhello\r\n"))
	f.WriteString("\x04")
	c.Wait()
	if c.ProcessState.ExitCode() != 0 {
	fmt.Printf("%v %q\n", c.ProcessState, s.String())
	}
	}
}
