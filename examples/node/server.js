const http = require("http");

http.createServer((request, response) => {
  response.end(`Hello, ${request.socket.remoteAddress}, from Node!\n`);
}).listen(8080, "0.0.0.0");
