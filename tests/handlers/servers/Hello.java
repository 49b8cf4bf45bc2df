import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;

/** Says who its client is, with the HTTP server of the JDK, or with a blocking socket. */
class Hello {
    static byte[] describe(InetSocketAddress peer) {
        return (peer.getAddress().getHostAddress() + " " + peer.getPort()).getBytes();
    }

    static void http(int port) throws IOException {
        HttpServer server = HttpServer.create(new InetSocketAddress(port), 0);
        server.createContext("/", exchange -> {
            byte[] body = describe(exchange.getRemoteAddress());
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }

    static void blocking(int port) throws IOException {
        try (ServerSocket listener = new ServerSocket(port)) {
            while (true) {
                try (Socket client = listener.accept()) {
                    InputStream request = client.getInputStream();
                    request.read(new byte[65536]);
                    byte[] body = describe((InetSocketAddress) client.getRemoteSocketAddress());
                    client.getOutputStream().write("HTTP/1.0 200 OK\r\n\r\n".getBytes());
                    client.getOutputStream().write(body);
                }
            }
        }
    }

    public static void main(String[] arguments) throws IOException {
        int port = Integer.parseInt(System.getenv("PORT"));
        if (arguments[0].equals("http")) {
            http(port);
        } else {
            blocking(port);
        }
    }
}
