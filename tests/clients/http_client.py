"""Python's http.client, which sends the body without waiting for 100."""
import http.client
import os
import ssl
import sys

keep, url = sys.argv[1:3]
scheme, address = url.split("://")
tls = ssl.create_default_context(cafile=os.environ["CA"])
tls.load_cert_chain(os.environ["CERT"], os.environ["KEY"])
connection = None
for request in sys.argv[3:]:
    method, target, media, file, expect = (request.split(" ") + [""] * 3)[:5]
    if keep == "new" or not connection:
        connection = (http.client.HTTPSConnection(address, timeout=20, context=tls)
                      if scheme == "https" else http.client.HTTPConnection(address, timeout=20))
    headers = {name: text for name, text in [("Content-Type", media), ("Expect", expect)] if text}
    connection.request(method, target, open(file, "rb").read() if file else None, headers)
    with connection.getresponse() as answer:
        answer.read()
        print(answer.status)
