"""Flask: gunicorn and `flask run` serve it."""

from flask import Flask, request

app = Flask(__name__)


@app.route("/")
def hello():
    return f"{request.remote_addr} {request.environ['REMOTE_PORT']}"
