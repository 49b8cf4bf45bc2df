// Says who its client is; what is sent to it comes back as it comes.
require("http").createServer((request, response) => {
  if (request.method === "POST") request.pipe(response);
  else response.end(`${request.socket.remoteAddress} ${request.socket.remotePort}`);
}).listen(process.env.PORT);
