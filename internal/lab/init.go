package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// InitMain is the main function of a lab's inits. Every program that calls Up or
// Start must call it first thing in main (tests: in TestMain): when the process
// is not an init it returns at once, else it never does.
func InitMain() {
	if len(os.Args) < 3 || os.Args[1] != "lab" || os.Args[2] != "__init" || os.Getenv(initEnv) == "" {
		return
	}
	// Namespaces belong to threads: what the first stage enters, the program it execs has as a whole.
	runtime.LockOSThread()
	var spec initSpec
	if err := json.Unmarshal([]byte(os.Getenv(initEnv)), &spec); err != nil {
		fail(fmt.Errorf("%s: %w", initEnv, err))
	}
	second := len(os.Args) > 5 && os.Args[5] == "joined"
	if !second {
		joinAndExec(spec)
	}
	for _, fd := range []int{fdGo, fdReply, fdListen} {
		unix.CloseOnExec(fd)
	}
	os.Unsetenv(initEnv)
	// Pid 1 ends when it is killed, not when it is asked to; caught (not ignored), so that children start with defaults.
	caught := make(chan os.Signal, 16)
	signal.Notify(caught, unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGPIPE)
	go func() {
		for range caught {
		}
	}()
	if spec.Port > 0 {
		fail(relayMain(spec))
	}
	if spec.Member == switchMember {
		waitGo()
		reply("ready")
		for {
			_ = unix.Pause()
		}
	}
	waitGo() // the disk may still be in the making
	if err := setUpNode(spec); err != nil {
		fail(err)
	}
	if err := setUpNetwork(spec); err != nil {
		fail(err)
	}
	l, err := net.FileListener(os.NewFile(fdListen, "control"))
	if err != nil {
		fail(err)
	}
	srv := newServer()
	go srv.reap()
	reply("ready")
	fail(srv.accept(l.(*net.UnixListener)))
}

func reply(line string) {
	f := os.NewFile(fdReply, "reply")
	fmt.Fprintln(f, line) // a maker that died does not listen; nobody else to tell
	f.Close()
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "lab init:", err)
	reply(strings.ReplaceAll(err.Error(), "\n", "; "))
	os.Exit(1)
}

// waitGo waits for the maker's word and ends with it if it died.
func waitGo() {
	var b [1]byte
	for {
		n, err := unix.Read(fdGo, b[:])
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			os.Exit(1)
		}
		unix.Close(fdGo)
		return
	}
}

// joinAndExec enters the lab's cgroups, makes them the roots of a new cgroup
// namespace, and starts this program anew in it.
func joinAndExec(spec initSpec) {
	for _, d := range spec.Cgroups {
		err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte("0"), 0)
		if errors.Is(err, os.ErrNotExist) {
			os.Exit(1) // a down was here meanwhile: this lab is no more
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "lab init: join", d+":", err) // one of several; the others find us
		}
	}
	if spec.NetOf > 0 {
		if err := enterNet(spec.NetOf); err != nil {
			fail(fmt.Errorf("network of the switch: %w", err))
		}
	} else if spec.Member != switchMember {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			fmt.Fprintln(os.Stderr, "lab init: cgroup namespace:", err) // cgroups made inside may outlive us; down looks for ours only
		}
	}
	fail(unix.Exec("/proc/self/exe", append(slices.Clone(os.Args[:5]), "joined"), os.Environ()))
}

// setUpNode gives the node its own file systems, host name and disk. Everything
// else of the machine's tree stays visible as it is.
func setUpNode(spec initSpec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Sethostname([]byte(spec.Member)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	// What the machine itself may have mounted there is not this node's.
	for _, p := range []string{spec.DataDir, spec.Mount} {
		for unix.Unmount(p, unix.MNT_DETACH) == nil {
		}
	}
	if err := mountDisk(spec.Image, spec.DataDir); err != nil {
		return err
	}
	if err := unix.Mount(spec.Hosts, "/etc/hosts", "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("/etc/hosts: %w", err)
	}
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("/run: %w", err)
	}
	if err := os.Mkdir("/run/lock", 0o777|os.ModeSticky); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("/dev/shm: %w", err)
	}
	// A new sysfs shows this network namespace, and new cgroup mounts this cgroup namespace.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("/sys: %w", err)
	}
	mountCgroups(hs)
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	return nil
}

func mountDisk(image, dir string) error {
	dev, err := attachLoop(image)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := unix.Mount(dev.Name(), dir, "ext4", unix.MS_NOATIME, "noinit_itable"); err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", dev.Name(), image, dir, err)
	}
	return nil
}

// mountCgroups mounts the machine's cgroup trees where they were. What cannot be
// mounted is missing in the node, and said in its log.
func mountCgroups(hs []hierarchy) {
	const root = "/sys/fs/cgroup"
	if !slices.ContainsFunc(hs, func(h hierarchy) bool { return h.Mount == root }) {
		if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
			fmt.Fprintln(os.Stderr, "lab init:", root+":", err)
			return
		}
	}
	for _, h := range hs {
		if h.Mount != root && !strings.HasPrefix(h.Mount, root+"/") {
			continue // outside /sys, so still there
		}
		err := os.MkdirAll(h.Mount, 0o755)
		if err == nil {
			err = unix.Mount(h.Type, h.Mount, h.Type, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, h.Options)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "lab init:", h.Mount+":", err)
		}
	}
}

// neighbour is the line by which ip learns a hardware address by heart.
func neighbour(addr, mac string) string {
	return "neigh replace " + addr + " lladdr " + mac + " nud permanent dev eth0\n"
}

// setUpNetwork gives eth0 its address, and the addresses of all others by heart:
// nothing is then asked by ARP, so a cut or its end takes effect at once and not
// after a second of retries.
func setUpNetwork(spec initSpec) error {
	// Nodes speak IPv4 with each other; without this each boot makes noise to find an IPv6 address.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0)
	batch := "link set dev lo up\naddr add " + spec.Addr + " dev eth0\nlink set dev eth0 up\n"
	for addr, mac := range spec.Neighbours {
		batch += neighbour(addr, mac)
	}
	_, err := tool(context.Background(), batch, "ip", "-batch", "-")
	return err
}
