# Every command that the README names. `make test` and `make demo` install what they need.
CARGO ?= cargo
PREFIX ?= /usr
DESTDIR ?=

.PHONY: build check size test fuzz install deb rpm test-system test-versions test-api torture deny repro unsafe demo bench

# The program shall be the same wherever it is built: no directory of this machine stays in it.
build deb rpm unsafe bench: export RUSTFLAGS := $(RUSTFLAGS) \
	--remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)/registry/src=/crates

# target/release/vpn-daemon
build:
	$(CARGO) build --release --locked

# Format, lints, documentation.
check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	tests/dependencies named

# Lines of code under src; fails above LIMIT.
LIMIT ?= 5080
size:
	tests/size $(LIMIT)

# Every test, the kernel's WireGuard in a virtual machine among them; as root.
test:
	tests/install-deps
	$(CARGO) test --locked

# Whose group reaches the OpenVPN sockets, and where the default file is: deb or rpm.
DISTRO ?= $(if $(wildcard /etc/debian_version),deb,rpm)
DEFAULTS = $(if $(filter deb,$(DISTRO)),/etc/default,/etc/sysconfig)
PLACE = sed -e 's|/usr/sbin/|$(PREFIX)/sbin/|' -e 's|/usr/libexec/|$(PREFIX)/libexec/|'
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

# As the packages do, without the file lists that `make deb` and `make rpm` keep for a clean removal.
install:
	test -x target/release/vpn-daemon || $(MAKE) build
	install -Dm755 target/release/vpn-daemon $(DESTDIR)$(PREFIX)/sbin/vpn-daemon
	install -Dm755 systemd/renew-credentials $(DESTDIR)$(PREFIX)/libexec/vpn-daemon/renew-credentials
	install -Dm644 systemd/vpn-daemon.socket $(UNITS)/vpn-daemon.socket
	$(PLACE) systemd/vpn-daemon.service >$(UNITS)/vpn-daemon.service
	install -Dm644 systemd/$(DISTRO)/openvpn-group.conf $(UNITS)/vpn-daemon.service.d/openvpn-group.conf
	install -Dm644 -t $(DESTDIR)$(PREFIX)/lib/tmpfiles.d tmpfiles.d/vpn-daemon.conf \
		$(if $(filter deb,$(DISTRO)),tmpfiles.d/vpn-daemon-openvpn.conf)
	$(if $(filter rpm,$(DISTRO)),install -Dm644 systemd/rpm/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/vpn-daemon.conf)
	install -Dm644 systemd/credentials.conf.example $(DESTDIR)$(PREFIX)/share/doc/vpn-daemon-rs/$(if $(filter deb,$(DISTRO)),examples/)credentials.conf
	install -Dm644 man/vpn-daemon.8 $(DESTDIR)$(PREFIX)/share/man/man8/vpn-daemon.8
	test -e $(DESTDIR)$(DEFAULTS)/vpn-daemon || install -Dm644 systemd/vpn-daemon.default $(DESTDIR)$(DEFAULTS)/vpn-daemon

# Another profile is for tests alone: make deb PROFILE=package-test
PROFILE ?= release
TOOLS = target/tools/bin
$(TOOLS)/%:
	$(CARGO) install --locked --root target/tools $*

# The bill of materials that both packages contain.
SBOM = target/vpn-daemon.cdx.json
$(SBOM): Cargo.lock Cargo.toml tests/dependencies
	mkdir -p target
	tests/dependencies sbom >$@

# target/debian/
deb: $(TOOLS)/cargo-deb $(SBOM)
	$(TOOLS)/cargo-deb --locked --profile $(PROFILE) --output target/debian/

# target/generate-rpm/
rpm: $(TOOLS)/cargo-generate-rpm $(SBOM)
	$(CARGO) build --locked --profile $(PROFILE)
	mkdir -p target/generate-rpm
	gzip -9n <man/vpn-daemon.8 >target/vpn-daemon.8.gz
	$(TOOLS)/cargo-generate-rpm --profile $(PROFILE) --auto-req builtin --output target/generate-rpm/

# Boots a Debian with systemd in QEMU and installs the package there; as root.
test-system:
	tests/system/run

# Other versions of OpenVPN and of the kernel; as root.
test-versions:
	CARGO="$(CARGO)" tests/versions

# Licences, sources and duplicates of the dependencies as deny.toml has them, and known faults where
# the list of these can be had.
deny: $(TOOLS)/cargo-deny
	$(TOOLS)/cargo-deny --locked check licenses bans sources
	@if $(TOOLS)/cargo-deny fetch db; then $(TOOLS)/cargo-deny --locked check advisories; \
	else echo 'deny: NOT CHECKED for advisories: their database cannot be had here' >&2; fi

# Each target of fuzz/ for so many seconds, with a nightly compiler; fails on a finding.
# ONLY="head status" names targets.
SECONDS ?= 60
fuzz: $(TOOLS)/cargo-fuzz
	tests/install-deps --only c++:g++
	CARGO="$(CARGO)" fuzz/run $(SECONDS) $(ONLY)

# Builds once more elsewhere, offline from vendored dependencies, and compares byte for byte.
repro: build
	CARGO="$(CARGO)" tests/reproducible

# How often the crates that are linked say `unsafe`.
unsafe:
	CARGO="$(CARGO)" tests/dependencies unsafe

# Real WireGuard, real OpenVPN and every call, in namespaces of its own; KEEP=1 leaves it running.
SUDO ?= $(if $(filter-out 0,$(shell id -u)),sudo)
demo:
	$(SUDO) tests/install-deps --only openvpn:openvpn wg:wireguard-tools wireguard-go:wireguard-go ip:iproute2 \
		ping:iputils-ping curl:curl openssl:openssl cc:build-essential \
		update-ca-certificates:ca-certificates
	$(MAKE) build
	@$(SUDO) KEEP="$(KEEP)" tests/demo $(or $(CARGO_TARGET_DIR),target)/release/vpn-daemon

# What the daemon costs beside a floor measured in the same run; ONLY=front, openvpn or wireguard.
bench:
	CARGO="$(CARGO)" tests/install-deps
	ONLY="$(ONLY)" $(CARGO) bench --locked --bench scale

# A portal's load while everything around two daemons breaks; as root. SEED repeats the harm, FAULT does
# one kind of it alone.
torture: SECONDS = 600
torture:
	CARGO="$(CARGO)" tests/install-deps --only wireguard-go:wireguard-go wg:wireguard-tools ip:iproute2 \
		openssl:openssl prlimit:util-linux kill:procps cc:build-essential
	SECONDS="$(SECONDS)" SEED="$(SEED)" $(CARGO) test --locked --test torture -- --ignored --nocapture

# openapi.yaml, the daemon and the HTTP clients of portals against each other; as root.
# PARTS: clients, schemathesis, description.
test-api: target/api/bin/st
	CARGO="$(CARGO)" tests/install-deps go:golang-go node:nodejs 'php:php-cli php-curl'
	$(CARGO) build --locked
	unshare --net --mount --pid --fork --kill-child --mount-proc \
		target/api/bin/python tests/test-api target/debug/vpn-daemon $(PARTS)

target/api/bin/st:
	python3 -m venv target/api || { apt-get update -q && apt-get install -q -y python3-venv && python3 -m venv target/api; }
	target/api/bin/pip install --quiet schemathesis==4.32.5
