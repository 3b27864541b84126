# Walnut. `make demo` shows it at work on a real image, `make test` proves it.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# Two end-to-end tests at a time: each runs a machine of its own.
TEST_THREADS ?= 2
# Always the same packages and features: then what they need is built once.
TESTS = $(CARGO) test --release --workspace --features walnut-agent/guest-tests
CLIPPY = $(CARGO) clippy --release --quiet --workspace --features walnut-agent/guest-tests
# Clones of one template that a test compares; `make e2e CLONES=200` takes minutes longer.
CLONES ?= 40

.PHONY: all deps build demo test unit e2e differential containerd-newer kill pods suites lab lab-short lint fuzz fuzz-short fmt bench bench-lab footprint install uninstall clean help

all: build

help: ## Show this
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

deps: ## Install the Debian packages that are missing (as root)
	@scripts/deps.sh

build: deps ## Build everything into out/
	@scripts/build.sh

demo: build ## Make a real image, serve it, pull it, run it
	@scripts/demo.sh

test: lint unit fuzz-short e2e lab-short ## Everything that must pass
	@echo "==> all tests passed"

lint: deps ## Formatting, shell scripts, lints
	@echo "==> lint"
	@$(CARGO) fmt --all --check
	@cd fuzz && $(CARGO) fmt --check
	@scripts/lint.sh
	@$(CLIPPY) --all-targets -- -D warnings
	@$(CLIPPY) --test containerd --test differential --test e2e --test oci -- -D warnings

unit: build ## Tests that need no sandbox of the whole product
	@echo "==> unit and component tests"
	@$(TESTS) -- --test-threads=$(TEST_THREADS)

e2e: build ## Tests of the product, with the real image
	@echo "==> end-to-end tests"
	@tests/image/build.sh
	@tests/image/programs.sh
	@echo 'clones of one template: $(CLONES), for their time; 200 with make e2e CLONES=200'
	@WALNUT_TEST_CLONES=$(CLONES) $(TESTS) --test containerd --test differential --test e2e --test oci -- --test-threads=$(TEST_THREADS)

differential: build ## The same bundles by crun and by walnut-oci, a part of e2e
	@$(TESTS) --test differential -- --test-threads=$(TEST_THREADS)

containerd-newer: build ## The containerd suite against containerd 1.7 and 2.x, of later Debians (tests/containerd.sh)
	@tests/containerd.sh 1.7
	@tests/containerd.sh 2

# The lab is slow: `make test` takes the part of the suite that shows walnut-vmm
# at work, `make lab` the whole.
LAB_TESTS ?= commands:: programs:: templates::a_container

lab-short: build
	@tests/image/build.sh
	@tests/lab/test.sh itself
	@echo 'left to make lab, for its time: thirty_two_vcpus_boot, most of the end-to-end suite'
	@tests/lab/test.sh vmm --skip thirty_two_vcpus_boot
	@tests/lab/test.sh e2e $(LAB_TESTS)

lab: build ## Tests with a real KVM, in an emulated host: all
	@tests/image/build.sh
	@tests/image/programs.sh
	@tests/lab/test.sh

# How many kills; WALNUT_SEED repeats them.
WALNUT_KILLS ?= 300
export WALNUT_KILLS

kill: build ## Kill each process at each step of a pod's life, WALNUT_KILLS times
	@tests/image/build.sh
	@$(TESTS) --test containerd -- --ignored --nocapture hundreds_of_kills

suites: build ## Real programs and what tests them, in a sandbox
	@tests/suites/run.sh

pods: build ## Twenty pods at once, or WALNUT_PODS
	@tests/image/build.sh
	@$(TESTS) --test containerd -- --ignored --nocapture many_pods_at_once

# Inputs for each target; the build with its sanitizer takes longer than a short run.
FUZZ_RUNS ?= 20000
FUZZ_SHORT ?= 500
# What the short run draws its inputs from; 0: others each time.
FUZZ_SEED ?= 0

fuzz: deps ## Every fuzz target, for FUZZ_RUNS inputs each
	@fuzz/run.sh --runs $(FUZZ_RUNS)

fuzz-short: deps
	@echo "==> fuzz targets, $(FUZZ_SHORT) inputs each"
	@fuzz/run.sh --runs $(FUZZ_SHORT) --seed $(FUZZ_SEED)

bench: build ## Start time and memory, beside crun and runsc
	@tests/image/build.sh
	@$(CARGO) run --release --quiet -p walnut-bench -- all

footprint: build ## What the agent, the supervisor and each exec take
	@echo "==> footprint"
	@tests/image/build.sh
	@$(CARGO) build --release --quiet --workspace --features walnut-agent/guest-tests --bin walnut-bench
	@$${CARGO_TARGET_DIR:-target}/release/walnut-bench footprint

bench-lab: build ## walnut-vmm beside QEMU on KVM, in an emulated host
	@bench/restore.sh
	@bench/lab.sh

install: build ## Install below PREFIX, in the file system DESTDIR; out/bin/walnut install sets a node up
	@out/bin/walnut install --prefix $(PREFIX) --root $(DESTDIR)/ --no-containerd --no-podman --no-docker

uninstall: ## Remove what install put there
	@out/bin/walnut uninstall --prefix $(PREFIX) --root $(DESTDIR)/ --no-containerd --no-podman --no-docker

fmt: ## Format
	$(CARGO) fmt --all

clean: ## Remove what was built; the caches of kernel and image stay
	$(CARGO) clean
	rm -rf out
