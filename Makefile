# make build: bin/unum. make test: everything. make demo: see it work.
# make deb: a Debian package. make torture: the long runs.
GO ?= go
export CGO_ENABLED = 0
VERSION := $(shell scripts/version)
LDFLAGS = -s -w
# Without it gRPC carries a web page for traces, with templates, and the linker
# must keep every method of every type: 4.5 MB.
TAGS = grpcnotrace

.PHONY: build test torture demo unit cluster deps clean check deb proto

build: bin/unum

bin/unum: FORCE
	@mkdir -p bin
	$(GO) build -tags '$(TAGS)' -trimpath -ldflags '$(LDFLAGS) -X main.release=$(VERSION)' -o cmd/unum/core/unum-core ./cmd/unum-core
	@sha256sum cmd/unum/core/unum-core | cut -c1-64 > cmd/unum/core/unum-core.id
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/unum ./cmd/unum

FORCE:

deps:
	@scripts/deps

# One package at a time: the clusters of ./test and those of ./internal/lab would
# have to share a small machine otherwise, and a test that asks for little of it
# would judge the neighbour. On two cores all of it takes 14 minutes, not 8.
test: deps build
	@[ "$$(id -u)" = 0 ] && echo "as root: the tests on real clusters run" || echo "as $$(id -un): tests that need root are skipped, and named at the end"
	$(GO) run gotest.tools/gotestsum@v1.13.0 --format pkgname --format-hide-empty-pkg -- -count=1 -timeout 20m -p 1 -parallel 2 ./test ./...

# The Go code of the control API, from its .proto file.
proto:
	@scripts/proto

torture: deps build
	GO="$(GO)" scripts/torture

clean:
	rm -rf bin cmd/unum/core/unum-core cmd/unum/core/unum-core.id

# deb: bin/unum_VERSION_ARCH.deb
deb: build
	packaging/build-deb bin

demo: deps build
	scripts/demo
