"""Python's requests: a session for each request, or one for all."""
import os
import sys

import requests

keep, url = sys.argv[1:3]
session = requests.Session()
for request in sys.argv[3:]:
    method, target, media, file, expect = (request.split(" ") + [""] * 3)[:5]
    session = requests.Session() if keep == "new" else session
    session.trust_env = False
    session.verify, session.cert = os.environ["CA"], (os.environ["CERT"], os.environ["KEY"])
    headers = {"Content-Type": media or None, "Expect": expect or None}
    body = open(file, "rb").read() if method == "POST" else None
    print(session.request(method, url + target, data=body, headers=headers, timeout=20).status_code)
