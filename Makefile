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
	tests/install-deps
	$(CARGO) test --locked
