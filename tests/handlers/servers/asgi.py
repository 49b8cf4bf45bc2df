"""An ASGI application: says who its client is; echoes a WebSocket. uvicorn serves it."""


async def app(scope, receive, send):
    if scope["type"] == "http":
        host, port = scope["client"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": f"{host} {port}".encode()})
    elif scope["type"] == "websocket":
        while (event := await receive())["type"] != "websocket.disconnect":
            if event["type"] == "websocket.connect":
                await send({"type": "websocket.accept"})
            else:
                await send({"type": "websocket.send", "bytes": event["bytes"]})
