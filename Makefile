# kata-rs: build, try, test, measure, install. `make help` lists the targets.

PREFIX ?= /usr/local
DESTDIR ?=
CACHE := $(or $(KATA_RS_CACHE),$(HOME)/.cache/kata-rs)
OUT := target/x86_64-unknown-linux-gnu/release
STAGE := target/stage
GUEST_IMAGE := target/guest.img
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

BINARIES := kata-rs containerd-shim-kata-rs-v2 kata-rs-vmm kata-rs-task kata-rs-agent kata-rs-image

.PHONY: help setup build kernel image stage install demo test unit e2e lint critest bench deb installer-image host clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what building and testing need (apt, as root or with sudo)
	@tests/setup

build: setup ## Build every binary
	@echo "==> building the binaries (cargo, release)"
	@cargo build --release --locked --bins

kernel: setup ## Build the guest kernel (cached by a hash of its inputs)
	@guest-kernel/build

image: build ## Build the guest image from the agent
	@$(OUT)/kata-rs-image build --agent $(OUT)/kata-rs-agent --output $(GUEST_IMAGE)

# Everything that `install` puts on a machine, below $(STAGE).
stage: build kernel image
	@$(MAKE) --no-print-directory files DESTDIR=$(CURDIR)/$(STAGE) PREFIX=/usr/local

.PHONY: files
files:
	@echo "==> installing below $(DESTDIR)$(PREFIX)"
	@install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/kata-rs
	@install -m 755 $(OUT)/kata-rs $(OUT)/containerd-shim-kata-rs-v2 $(OUT)/kata-rs-image $(DESTDIR)$(PREFIX)/bin/
	@install -m 755 $(OUT)/kata-rs-vmm $(OUT)/kata-rs-task $(DESTDIR)$(PREFIX)/lib/kata-rs/
	@install -m 644 $(CACHE)/kernel/current/vmlinux $(DESTDIR)$(PREFIX)/lib/kata-rs/vmlinux
	@install -m 644 $(GUEST_IMAGE) $(DESTDIR)$(PREFIX)/lib/kata-rs/guest.img

install: build kernel image ## Install into PREFIX (default /usr/local)
	@$(MAKE) --no-print-directory files

deb: stage ## Build the Debian package, target/kata-rs_VERSION_amd64.deb
	@deploy/debian/build

installer-image: stage ## Build the image of the installer's DaemonSet, target/kata-rs-installer.oci.tar (as root)
	@deploy/image/build

host: setup ## Build the test host (only where there is no hardware KVM)
	@tests/host/build

demo: stage ## Run a container in a microVM and show that its kernel is not the host's
	@tests/demo

test: lint unit e2e ## Everything: lints, unit tests, end-to-end suites
	@tests/report target/test-logs/*.log

lint: setup ## rustfmt and clippy, warnings denied
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --locked --quiet -- -D warnings

unit: setup ## Unit and integration tests that need no Linux guest
	@mkdir -p target/test-logs
	@cargo test --workspace --exclude kata-rs-tests --locked -- --show-output 2>&1 | tee target/test-logs/unit.log

e2e: stage ## End-to-end suites with real guests
	@mkdir -p target/test-logs
	@tests/e2e-run 2>&1 | tee target/test-logs/e2e.log

critest: stage ## CRI conformance (RUNTIME=... CONTAINERD=2.1|2.3 for one run); writes docs/conformance.md
	@tests/critest/run $(if $(or $(CONTAINERD),$(RUNTIME)),$(or $(CONTAINERD),2.1):$(or $(RUNTIME),kata-rs))

bench: stage ## Measure against runc and runsc, side by side; writes docs/benchmarks.md
	@tests/bench/run

clean: ## Remove build results (caches outside the checkout stay)
	@rm -rf target
