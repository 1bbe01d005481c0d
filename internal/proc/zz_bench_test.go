package proc

import (
	"os"
	"os/exec"
	"testing"
)

func TestZZBench(t *testing.T) {
	if os.Getenv("RB") == "" {
		t.Skip()
	}
	r := newRig(t)
	c := exec.Command("sh", "-c", os.Getenv("RB"))
	c.Env = append(os.Environ(), "UNUM_SOCKET="+r.sock, "UNUM="+unumBin)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.Run()
}
