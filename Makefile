# holdfast: `make` prints what can be made.
GO      ?= go
OUT     := .ci/out
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
LINT    := $(GO) tool -modfile=.ci/tools/go.mod golangci-lint

# All that is not built for the race detector is built alike, and so compiled once. Programs
# built with -trimpath find Go's own source by GOROOT alone.
export CGO_ENABLED := 0
export GOFLAGS     := $(strip $(shell $(GO) env GOFLAGS) -trimpath)
export GOROOT      := $(shell $(GO) env GOROOT)

# Packages whose tests only compute, in whatever time they are given.
COMPUTE := . ./blockdev ./blockdev/blockdevtest ./blockdev/disk ./blockdev/vfs ./raftstore/state ./replication/coordinator \
	./replication/replica ./replication/wire ./replication/latency ./replication/sim ./cmd/internal/history
# Packages whose tests start no cluster of processes: they run side by side. All others
# run one at a time, for on two cores they would disturb each other's takeovers.
BESIDE := ./replication/attachment ./cmd/internal/lab ./blockdev/nbd ./raftstore/badgerlog ./cmd/bench ./replication/serve \
	./cmd/internal/api ./cmd/internal/controller ./cmd/holdfast

.PHONY: help build unit test computing timed race proofs demo sim chaos bench bench-disk soak leftovers crash fuzz lint proto glossary clean

help: ## print the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/holdfast, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/holdfast ./cmd/holdfast

unit: ## tests that need no privileges, under 5 minutes
	@mkdir -p $(OUT)
	HOLDFAST_UNIT=1 .ci/gotest unit ./...

race: ## the unit tests under the race detector
	@mkdir -p $(OUT)
	HOLDFAST_UNIT=1 .ci/gotest race -race ./...

test: build ## all that this machine can run, as root
	.ci/beside computing $(MAKE) --no-print-directory computing -- $(MAKE) --no-print-directory timed

# What make test runs at idle priority all the while: it needs time, but at no given moment.
computing: lint
	.ci/gotest computed -race $(COMPUTE)
	$(MAKE) --no-print-directory proofs

# What make test runs meanwhile: it waits more than it computes, and has deadlines.
timed:
	@mkdir -p $(OUT)
	.ci/gotest beside -race -p 4 $(BESIDE)
	.ci/gotest test -race -p 1 -parallel 6 $$($(GO) list ./... | grep -vxF "$$($(GO) list $(COMPUTE) $(BESIDE))")
	.ci/demo
	$(MAKE) --no-print-directory chaos MINUTES=2
	$(GO) run ./cmd/bench -holdfast bin/holdfast -quick -json $(OUT)/bench.json
	$(GO) run ./cmd/bench -disk -quick -json $(OUT)/bench-disk.json
	$(GO) run ./cmd/demo leftovers

# Simulators make garbage fast: collected less often they take half the processor time.
# What a disk takes of memory is measured as it ships.
LAVISH := GOGC=400 GOMEMLIMIT=1GiB GODEBUG=memprofilerate=0

proofs: ## simulated clusters, crash points of a disk, and their mutants: computing alone, no privileges
	$(LAVISH) $(MAKE) --no-print-directory sim SEEDS=10000
	$(LAVISH) .ci/gotest mutants -tags holdfast_mutants -run 'TestMutants' ./replication/sim
	$(LAVISH) .ci/gotest disk-mutants -tags holdfast_mutants -run 'TestMutants' ./blockdev/disk
	$(LAVISH) .ci/gotest lose-acked -tags holdfast_mutant_lose_acked -run 'LoseAcked' ./replication/sim
	$(LAVISH) HOLDFAST_CRASHES=$(CRASHES) .ci/gotest crashes -run 'TestCrashes|TestHarm|TestInject' ./blockdev/disk
	.ci/gotest tebibyte -run 'TestTebibyte' ./blockdev/disk

# Crash points of a disk that make proofs looks at.
CRASHES ?= 100000

demo: build ## three Docker hosts, a database on a volume, a host dies; BREAK=lose-acked must fail
	$(GO) run ./cmd/demo $(if $(BREAK),-break $(BREAK))

# Another schedule with every commit, the same one for the same commit.
MINUTES ?= 10
SEED    ?= $(shell printf '%d' 0x$$(git rev-parse HEAD 2>/dev/null | cut -c1-8 | grep . || echo 1))
sim: ## SEEDS=n with SEED=first, SEEDS=FROM-TO or MINUTES=n: simulated clusters of the cores that ship
	.ci/gotest sim ./replication/sim -run 'TestSeeds|TestCoverage|TestRunFlat' -seed $(SEED) $(if $(SEEDS),-seeds $(SEEDS),-minutes $(MINUTES))

chaos: build ## MINUTES=n SEED=s: real nodes, real faults, histories judged; CHAOS= more flags
	@mkdir -p $(OUT)
	$(GO) build -o $(OUT)/chaos ./cmd/chaos
	$(OUT)/chaos -holdfast bin/holdfast -minutes $(MINUTES) -seed $(SEED) $(CHAOS)

bench: build ## the same jobs on holdfast and on nbdkit, as ratios
	$(GO) run ./cmd/bench -holdfast bin/holdfast $(BENCH)

bench-disk: ## one disk of holdfast beside a file of the same file system, as ratios; BENCH= more flags
	$(GO) run ./cmd/bench -disk $(BENCH)

soak: build ## the long proofs: minutes to hours, as root
	@mkdir -p $(OUT)
	$(GO) run ./cmd/demo -rounds 20 -report $(OUT)/soak-hosts.json
	HOLDFAST_SOAK=1 HOLDFAST_SOAK_ROUNDS=25 .ci/gotest soak -timeout 4h -run 'TestReplicaDiesUnderVerify|TestHolderDies|TestSourceDiesDuringResync|TestRunFlat|TestWriterStops|Takeover|Death|Kill' ./cmd/e2e ./cmd/internal/keeper
	HOLDFAST_SOAK=1 .ci/gotest soak-rejoin -timeout 1h -run TestEvictAndRejoin ./replication/attachment
	$(MAKE) --no-print-directory chaos MINUTES=60

crash: ## crash points of one disk: MINUTES=N as many as fit, or SEEDS=FROM-TO
	HOLDFAST_SEEDS=$(SEEDS) HOLDFAST_CRASH_MINUTES=$(if $(SEEDS),,$(or $(MINUTES),30)) $(GO) test -count=1 -v -timeout 24h -run TestCrashes ./blockdev/disk

# What a target finds stays in the build cache; a failing input is written to testdata/fuzz.
FUZZ_SECONDS ?= 60
FUZZ         ?= ./blockdev/disk
fuzz: ## every fuzz target of FUZZ=./... for FUZZ_SECONDS each: WAL scanner, superblock, map pages, directory, whole disks
	.ci/fuzz $(FUZZ_SECONDS) $(FUZZ)

leftovers: ## what tests and the demo left behind; fails if there is anything
	$(GO) run ./cmd/demo leftovers

lint: ## gofmt, go vet and golangci-lint
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'run gofmt -w'; exit 1; }
	@.ci/glossary | cmp -s - docs/glossary.md || { echo 'docs/glossary.md is old: run make glossary'; exit 1; }
	$(GO) vet ./...
	$(LINT) run --timeout 15m ./...

proto: ## generate Go from the .proto files
	$(GO) generate ./...

glossary: ## docs/glossary.md from the root package's documentation
	@.ci/glossary > docs/glossary.md

clean: ## remove what was built
	rm -rf bin $(OUT)
