// Says who its client is, or what the SHA-256 is of what it sends.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(writer http.ResponseWriter, request *http.Request) {
		if request.Method == "POST" {
			hash := sha256.New()
			io.Copy(hash, request.Body)
			fmt.Fprintf(writer, "%x", hash.Sum(nil))
		} else {
			fmt.Fprint(writer, request.RemoteAddr)
		}
	})
	panic(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
