# Erasing the Go package stops and disables the unit, after this package is in place: posttrans brings
# it back.
if [ "$1" -eq 1 ] && systemctl is-enabled --quiet vpn-daemon.service 2>/dev/null; then
	touch /run/vpn-daemon-rs.enabled
fi
