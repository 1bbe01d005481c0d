package load

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of CPU times in /proc: USER_HZ, 100 on every Linux that Go
// runs on.
const tick = time.Second / 100

type cpuTimes struct{ busy, total uint64 } // ticks

type memInfo struct{ total, available uint64 } // bytes

type sight struct {
	running float64
	cpu     time.Duration
	memory  uint64
}

// read returns the beginning of a file, as much as fits the meter's buffer; it
// is good until the next read.
func (m *Meter) read(path string) []byte {
	b, err := readInto(path, m.buf)
	if err != nil && err != unix.ESRCH {
		m.warn(path, err)
	}
	return b
}

func readInto(path string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	n := 0
	for n < len(buf) {
		k, err := unix.Read(fd, buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if k == 0 {
			break
		}
		n += k
	}
	return buf[:n], nil
}

func (m *Meter) cpuTimes() cpuTimes { return parseStat(m.read(m.cfg.proc + "/stat")) }

// parseStat reads the line "cpu user nice system idle iowait irq softirq steal
// ..."; guest times are inside user's. Stolen time is busy: it cannot be had.
func parseStat(b []byte) (c cpuTimes) {
	line, _, _ := bytes.Cut(b, []byte{'\n'})
	f := bytes.Fields(line)
	if len(f) < 9 || string(f[0]) != "cpu" {
		return c
	}
	for i, s := range f[1:9] {
		v := number(s)
		c.total += v
		if i != 3 && i != 4 { // idle, iowait
			c.busy += v
		}
	}
	return c
}

// running counts the machine's running and ready threads but the one that asks.
func (m *Meter) running() float64 { return parseLoadavg(m.read(m.cfg.proc + "/loadavg")) }

func parseLoadavg(b []byte) float64 {
	f := bytes.Fields(b)
	if len(f) < 4 {
		return 0
	}
	r, _, _ := bytes.Cut(f[3], []byte{'/'})
	if n := number(r); n > 0 {
		return float64(n - 1)
	}
	return 0
}

func (m *Meter) memory() memInfo { return parseMeminfo(m.read(m.cfg.proc + "/meminfo")) }

func parseMeminfo(b []byte) (mi memInfo) {
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch string(f[0]) {
		case "MemTotal:":
			mi.total = number(f[1]) << 10
		case "MemAvailable:":
			mi.available = min(number(f[1])<<10, mi.total) // follows MemTotal
			return mi
		}
	}
	return mi
}

// memStall returns the part of the last ten seconds in which some task waited
// for memory, 0 if the kernel does not tell.
func (m *Meter) memStall() float64 {
	b, err := readInto(m.cfg.proc+"/pressure/memory", m.buf)
	if err != nil {
		return 0
	}
	return parsePressure(b)
}

func parsePressure(b []byte) float64 {
	f := bytes.Fields(b)
	if len(f) < 2 || string(f[0]) != "some" {
		return 0
	}
	s, ok := bytes.CutPrefix(f[1], []byte("avg10="))
	if !ok {
		return 0
	}
	v, err := strconv.ParseFloat(string(s), 64)
	if err != nil || !(v > 0) {
		return 0
	}
	return min(v/100, 1)
}

// network returns the bytes that all interfaces but the loopback have moved.
func (m *Meter) network() uint64 { return parseNetDev(m.read(m.cfg.proc + "/net/dev")) }

func parseNetDev(b []byte) (sum uint64) {
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(line, []byte{':'})
		if !ok || string(bytes.TrimSpace(name)) == "lo" {
			continue
		}
		if f := bytes.Fields(rest); len(f) >= 9 {
			sum += number(f[0]) + number(f[8])
		}
	}
	return sum
}

// netSpeed returns what the fastest interface can move both ways together, in
// bytes a second, 0 if none tells.
func netSpeed(dir string) (best uint64) {
	names, err := filepath.Glob(dir + "/*/speed")
	if err != nil {
		return 0
	}
	for _, n := range names {
		b, err := os.ReadFile(n) // an interface that is down answers EINVAL
		if err != nil {
			continue
		}
		if mbit, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 32); err == nil && mbit > 0 {
			best = max(best, uint64(mbit)*1_000_000/8*2)
		}
	}
	return best
}

// processes adds up what is in sight: the processes of this PID namespace and
// of those in it. A child's time moves to its parent when it is reaped, so the
// sum over living processes and their reaped children loses little.
func (m *Meter) processes() (s sight) {
	d, err := os.Open(m.cfg.proc)
	if err != nil {
		m.warn(m.cfg.proc, err)
		return s
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		m.warn(m.cfg.proc, err)
		return s
	}
	self := strconv.Itoa(os.Getpid())
	for _, n := range names {
		if n[0] < '1' || n[0] > '9' {
			continue
		}
		b, err := readInto(m.cfg.proc+"/"+n+"/stat", m.buf)
		if err != nil {
			continue // it has ended
		}
		p := parsePidStat(b)
		s.cpu += p.cpu
		s.memory += p.memory
		if n != self {
			s.running += p.running
		}
	}
	return s
}

// parsePidStat reads /proc/PID/stat. The name in brackets may hold anything.
func parsePidStat(b []byte) (s sight) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return s
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 22 {
		return s
	}
	if string(f[0]) == "R" {
		s.running = 1
	}
	for _, t := range f[11:15] { // utime stime cutime cstime
		s.cpu += time.Duration(min(number(t), 1<<40)) * tick
	}
	s.memory = min(number(f[21]), 1<<40) * uint64(os.Getpagesize())
	return s
}

// number reads a decimal number, 0 if it is none.
func number(b []byte) uint64 {
	v, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		return 0
	}
	return v
}
