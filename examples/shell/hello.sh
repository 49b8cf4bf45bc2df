#!/bin/sh
# The client's socket is standard input and standard output.
end=$(printf '\r')
read -r method path version
while read -r line && [ "$line" != "$end" ]; do :; done     # what is left unread resets the connection
printf 'HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n'
echo "Hello from a shell, where you asked for $path!"
