# Every command that the README names. `make test` and `make demo` install what they need.
CARGO ?= cargo
PREFIX ?= /usr
DESTDIR ?=

.PHONY: build check test

build:
	$(CARGO) build --release --locked

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

test:
	$(CARGO) test --locked

# Real WireGuard, real OpenVPN and every call, in namespaces of its own; KEEP=1 leaves it running.
.PHONY: demo
demo:
	@CARGO="$(CARGO)" KEEP="$(KEEP)" tests/demo
