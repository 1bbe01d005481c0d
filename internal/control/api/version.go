package api

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/unum-os/unum/internal/errs"
)

// The version of the API. Minor grows with every method or field that is added;
// Major, and the package's name in unum.proto with it, with a change that older
// programs would misunderstand.
const (
	Major = 1
	Minor = 3
)

// versionKey is the header in which both ends say their version. A foreign client
// need not.
const versionKey = "unum-api"

func version() string { return fmt.Sprintf("%d.%d", Major, Minor) }

// theirs returns the version that the caller says, "" if it says none.
func theirs(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(versionKey); len(v) > 0 {
		return clip(v[0], 16)
	}
	return ""
}

// fits refuses the programs of another major version.
func fits(ctx context.Context) error {
	v := theirs(ctx)
	if v == "" {
		return nil
	}
	major, _, _ := strings.Cut(v, ".")
	if n, err := strconv.Atoi(major); err != nil || n != Major {
		return errs.E(errs.NotSupported, "", "", "this command speaks version %s of the control API, the daemon version %s", v, version()).
			WithRemedy("use the unum that the daemon was started with, or restart the daemon with this one")
	}
	return nil
}

// unknown refuses a method that there is not, or not on this node.
func unknown(ctx context.Context, method string) error {
	if _, ok := access[method]; ok {
		return errs.E(errs.NotSupported, "", "", "this node does not offer %s: it is not for nodes of its role", method).WithRemedy("unum nodes, and ask a storing node")
	}
	e := errs.E(errs.NotSupported, "", "", "the daemon does not know %s", clip(method, 128))
	if v := theirs(ctx); v != "" && v != version() {
		e = errs.E(errs.NotSupported, "", "", "the daemon does not know %s: it speaks version %s of the control API, this command version %s", clip(method, 128), version(), v).
			WithRemedy("restart the daemon with this unum")
	}
	return e
}
