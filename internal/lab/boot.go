package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/unum-os/unum/internal/errs"
)

// initSpec tells a new init what to be. It travels in its environment.
type initSpec struct {
	Lab     string
	Member  string   // n1, n2, ... or switch
	Cgroups []string // to join before anything else

	// The rest is for nodes.
	Image   string
	DataDir string
	Mount   string
	Hosts   string // file to show as /etc/hosts
	Addr    string // address/bits of eth0

	Neighbours map[string]string // the other nodes' hardware addresses

	// The rest is for relays.
	NetOf int // process whose network namespace to enter
	Port  int // the port to stand before
	Link  Link
}

const (
	initEnv      = "UNUM_LAB_INIT"
	switchMember = "switch"
)

// Descriptors of an init, after stdin, stdout and stderr.
const (
	fdGo     = 3 + iota // read: one byte when cable and disk are there; end of file when the maker died
	fdReply             // write: "ready\n", or why not
	fdListen            // nodes only: the listening control socket
)

// booting is an init that was started and waits for the word to go on.
type booting struct {
	n     *nodeState // nil for the switch
	proc  procID
	goOn  *os.File
	reply *os.File
}

func (b *booting) close() {
	b.goOn.Close()
	b.reply.Close()
}

// spawn starts an init in new namespaces.
func (s *state) spawn(spec initSpec, flags uintptr, sock *net.UnixListener) (*booting, error) {
	env, err := json.Marshal(spec)
	if err != nil {
		return nil, errs.Wrap(err, "lab: start", spec.Member)
	}
	log, err := os.OpenFile(filepath.Join(s.Dir, "logs", spec.Member+".log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return nil, errs.Wrap(err, "lab: start", spec.Member)
	}
	defer log.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		return nil, errs.Wrap(err, "lab: start", spec.Member)
	}
	defer goR.Close()
	repR, repW, err := os.Pipe()
	if err != nil {
		goW.Close()
		return nil, errs.Wrap(err, "lab: start", spec.Member)
	}
	defer repW.Close()
	b := &booting{goOn: goW, reply: repR}
	cmd := &exec.Cmd{
		// Not a path from the file system: the program may have been replaced, or have none.
		Path:        "/proc/self/exe",
		Args:        []string{"unum-lab", "lab", "__init", s.Name, spec.Member},
		Env:         append(os.Environ(), initEnv+"="+string(env)),
		Dir:         "/",
		Stdout:      log,
		Stderr:      log,
		ExtraFiles:  []*os.File{goR, repW},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	}
	if sock != nil {
		f, err := sock.File()
		if err != nil {
			b.close()
			return nil, errs.Wrap(err, "lab: start", spec.Member)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	if err := cmd.Start(); err != nil {
		b.close()
		return nil, errs.Wrap(err, "lab: start", spec.Member)
	}
	go func() { _ = cmd.Wait() }() // no zombie while we live; how it ended is asked elsewhere
	if b.proc, err = identify(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		b.close()
		return nil, errs.E(errs.IO, "lab: start", spec.Member, "it ended at once: %v", err)
	}
	return b, nil
}

// proceed lets the init go on and waits until it is ready.
func (b *booting) proceed(ctx context.Context) error {
	deadline := time.Now().Add(bootTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	stop := context.AfterFunc(ctx, func() { _ = b.reply.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := b.reply.SetReadDeadline(deadline); err != nil {
		return err
	}
	if _, err := b.goOn.Write([]byte{'g'}); err != nil {
		return fmt.Errorf("its init ended: %w", err)
	}
	line, err := bufio.NewReader(io.LimitReader(b.reply, 64<<10)).ReadString('\n')
	switch line = strings.TrimSpace(line); {
	case line == "ready":
		return nil
	case ctx.Err() != nil:
		return errs.E(errs.Interrupted, "", "", "%w", context.Cause(ctx))
	case line != "":
		return errs.E(errs.IO, "", "", "%s", line)
	}
	return fmt.Errorf("its init said nothing: %w", err)
}

// startSwitch starts the switch and makes the bridge in it.
func (s *state) startSwitch(ctx context.Context) error {
	cg, err := makeCgroups(s.Name, switchMember)
	if err != nil {
		return err
	}
	b, err := s.spawn(initSpec{Lab: s.Name, Member: switchMember, Cgroups: cg}, unix.CLONE_NEWNET, nil)
	if err != nil {
		return err
	}
	defer b.close()
	reached("switch spawned")
	s.Switch = b.proc
	if err := s.save(); err != nil {
		return err
	}
	if err := b.proceed(ctx); err != nil {
		return errs.Wrap(err, "lab up: switch of", s.Name)
	}
	return s.makeBridge(ctx)
}

// boot powers nodes on: namespaces, network, disk. before, if not nil, is waited
// for when all is started but no disk is touched yet. No daemon is started.
func (s *state) boot(ctx context.Context, nodes []*nodeState, before func() error) error {
	var started []*booting
	defer func() {
		for _, b := range started {
			b.close()
		}
	}()
	for _, n := range nodes {
		others := map[string]string{}
		for _, o := range s.Nodes {
			if o != n {
				others[o.Addr.String()] = macString(s.mac(o.Index))
			}
		}
		if err := os.MkdirAll(filepath.Dir(s.image(n.Name)), 0o755); err != nil {
			return errs.Wrap(err, "lab: start", n.Name)
		}
		if err := s.bootClock(n); err != nil {
			return err
		}
		cg, err := makeCgroups(s.Name, n.Name)
		if err != nil {
			return err
		}
		path := sockPath(s.Name, n.Name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return errs.Wrap(err, "lab: start", n.Name)
		}
		sock, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return errs.Wrap(err, "lab: start", n.Name)
		}
		sock.SetUnlinkOnClose(false)
		b, err := s.spawn(initSpec{
			Lab: s.Name, Member: n.Name, Cgroups: cg, Image: s.image(n.Name), DataDir: s.DataDir, Mount: s.Mount,
			Hosts: filepath.Join(s.Dir, "hosts"), Addr: fmt.Sprintf("%s/%d", n.Addr, s.Subnet.Bits()), Neighbours: others,
		}, unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC, sock)
		sock.Close()
		if err != nil {
			return err
		}
		reached("node spawned")
		b.n = n
		n.Proc, n.On, n.Ready = b.proc, true, false
		started = append(started, b)
	}
	if err := s.save(); err != nil {
		return err
	}
	reached("nodes recorded")
	err := s.plug(ctx, nodes)
	reached("plugged")
	if before != nil {
		if berr := before(); err == nil {
			err = berr
		}
	}
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	failed := make([]error, len(started))
	for i, b := range started {
		wg.Go(func() { failed[i] = errs.Wrap(b.proceed(ctx), "lab: power on", b.n.Name) })
	}
	wg.Wait()
	for i, b := range started {
		b.n.Ready = failed[i] == nil
	}
	if err := s.save(); err != nil {
		return err
	}
	for _, err := range failed {
		if err != nil {
			return err
		}
	}
	return nil
}

// deviceRemedy says what to do about a device that cannot be opened.
func deviceRemedy(err error, module string) string {
	if errors.Is(err, os.ErrPermission) {
		return "root may not use it here: in a container, run it with --privileged"
	}
	return "modprobe " + module + ", or a kernel that has it; in a container, run it with --privileged"
}

// preflight says what is missing on this machine before anything is made.
func preflight() error {
	if os.Geteuid() != 0 {
		return needsRoot("lab up")
	}
	var missing []string
	pkgs := map[string]bool{}
	for _, t := range []struct{ prog, pkg string }{
		{"ip", "iproute2"}, {"tc", "iproute2"}, {"nsenter", "util-linux"}, {"mkfs.ext4", "e2fsprogs"}, {"sh", "dash"},
	} {
		if _, err := exec.LookPath(t.prog); err != nil {
			missing = append(missing, t.prog)
			pkgs[t.pkg] = true
		}
	}
	if len(missing) > 0 {
		var list []string
		for _, p := range []string{"iproute2", "util-linux", "e2fsprogs", "dash"} {
			if pkgs[p] {
				list = append(list, p)
			}
		}
		return errs.E(errs.NotFound, "lab up", "", "%s not found in PATH", strings.Join(missing, ", ")).
			WithRemedy("apt-get install %s", strings.Join(list, " "))
	}
	for _, d := range []struct{ dev, mod string }{{"/dev/loop-control", "loop"}, {"/dev/fuse", "fuse"}} {
		f, err := os.OpenFile(d.dev, os.O_RDWR, 0)
		if err != nil {
			return errs.E(errs.NotSupported, "lab up", d.dev, "%w", err).WithRemedy("%s", deviceRemedy(err, d.mod))
		}
		f.Close()
	}
	// A try says more than a capability mask.
	probe := exec.Command("/bin/sh", "-c", ":")
	probe.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := probe.Run(); err != nil {
		return errs.E(errs.Permission, "lab up", "", "this root may not make namespaces: %w", err).
			WithRemedy("in a container, run it with --privileged")
	}
	return nil
}
