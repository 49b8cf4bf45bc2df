package main

import (
	"fmt"
	"log"
	"net/http"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "Hello, %s, from Go!\n", r.RemoteAddr)
	})
	log.Fatal(http.ListenAndServe(":8080", nil))
}
