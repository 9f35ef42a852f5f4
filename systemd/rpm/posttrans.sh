if [ -e /run/vpn-daemon-rs.enabled ]; then
	rm /run/vpn-daemon-rs.enabled
	systemctl daemon-reload || :
	systemctl enable --now vpn-daemon.service || :
fi
