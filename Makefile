# stoop: make demo shows it, make test tests it. Both need only Go.

export CGO_ENABLED ?= 0
GO      ?= go
LDFLAGS := -s -w
CORPUS  := $(wildcard ../shared/alerts)
export STOOP_CORPUS ?= $(if $(CORPUS),$(abspath $(CORPUS)))

.PHONY: build demo test race lint fuzz chart e2e e2e-node e2e-host bench docs packages image release test-release clean

build: ## the program, ./stoop
	$(GO) build -ldflags '$(LDFLAGS)' -o stoop .

demo: build ## alerts through a FIFO, the broker, the rules and the responders, on this machine
	./examples/demo.sh

test: ## unit tests, golden files, the real program on scripts; needs only Go
	$(GO) test ./...

race: ## the same, looking for data races; needs a C compiler
	CGO_ENABLED=1 $(GO) test -race -timeout 20m ./...

lint: ## formatting, vet, staticcheck
	@bad=$$($(GO) tool gofumpt -l .); if [ -n "$$bad" ]; then echo "not formatted (go tool gofumpt -w .):"; echo "$$bad"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags failpoints ./...
	cd e2e && $(GO) vet ./...
	cd charts && $(GO) vet ./...
	cd tools && $(GO) vet ./...
	$(GO) tool staticcheck ./...

fuzz: ## 20 s of each fuzz target
	$(GO) test -run '^$$' -fuzz '^FuzzParse$$' -fuzztime 20s -fuzzminimizetime 10x ./alert

chart: ## lint the Helm chart, render every values file, hold it against the program; builds Helm the first time (minutes)
	cd charts && $(GO) test -timeout 25m -count=1 .

e2e: ## against a real kube-apiserver, built from its modules the first time (minutes)
	cd e2e && $(GO) test -timeout 25m -count=1 ./...

e2e-node: ## on a real node with real pods, as root: frozen, cut off and dead after how long
	cd e2e && $(GO) run ./node $(if $(WRITE),-write ../docs/performance.md)
	cd e2e && $(GO) run ./node -chart

e2e-host: ## on a host with a real systemd, as root: install, upgrade under load, remove
	cd e2e && E2E_HOST=1 $(GO) test -count=1 -timeout 30m -v ./host

bench: ## the figures of docs/performance.md, measured here
	$(GO) test -run '^$$' -bench . -benchtime 2s ./alert ./pipe ./rules ./cli
	cd e2e && $(GO) run ./cmd/bench -write ../docs/performance.md

docs: ## write the generated documentation again
	$(GO) test ./responders ./cli -run 'Docs' -update

packages: ## dist/*.deb and dist/*.rpm
	cd tools && $(GO) run ./release $(if $(VERSION),-version $(VERSION)) packages

image: ## dist/stoop_VERSION_image.tar: an OCI layout for linux/amd64 and arm64
	cd tools && $(GO) run ./release $(if $(VERSION),-version $(VERSION)) image

release: ## all of it, the programs and SHA256SUMS, in dist/; IMAGE is where the image is published
	cd tools && $(GO) run ./release $(if $(VERSION),-version $(VERSION)) $(if $(IMAGE),-image $(IMAGE)) all

test-release: ## that it is the same wherever it is built, and what is in it
	cd tools && $(GO) test -count=1 -timeout 20m ./...

clean:
	rm -rf stoop bin dist
