// Go's net/http: a connection for each request, or one for all.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	keep, url := os.Args[1], os.Args[2]
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(os.Getenv("CA"))))
	pair := must(tls.LoadX509KeyPair(os.Getenv("CERT"), os.Getenv("KEY")))
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives:     keep == "new",
		ExpectContinueTimeout: 15 * time.Second,
		TLSClientConfig:       &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}},
	}}
	for _, call := range os.Args[3:] {
		words := append(strings.Split(call, " "), "", "", "")
		var body io.Reader
		if words[0] == "POST" {
			body = bytes.NewReader(must(os.ReadFile(words[3])))
		}
		request := must(http.NewRequest(words[0], url+words[1], body))
		request.Header = http.Header{"Content-Type": {words[2]}}
		if words[4] != "" {
			request.Header.Set("Expect", words[4])
		}
		answer := must(client.Do(request))
		must(io.Copy(io.Discard, answer.Body))
		answer.Body.Close()
		fmt.Println(answer.StatusCode)
	}
}
