if [ "$1" -ge 1 ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload || :
	systemctl try-restart vpn-daemon.service || :
fi
