# Fedora starts what the administrator's preset enables, and nothing else. tmpfiles.d and sysusers.d
# are handled by the triggers of the systemd package.
if [ "$1" -eq 1 ] && [ -x /usr/bin/systemctl ]; then
	systemctl --no-reload preset vpn-daemon.service || :
fi
