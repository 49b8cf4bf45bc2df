from flask import Flask, request

app = Flask(__name__)


@app.route("/")
def hello():
    return f"Hello, {request.remote_addr}, from Flask!\n"
