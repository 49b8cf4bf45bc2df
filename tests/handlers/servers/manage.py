"""Django in one file: `python3 manage.py runserver 0.0.0.0:8000`."""

import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path

settings.configure(DEBUG=True, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)
urlpatterns = [path("", lambda request: HttpResponse(request.META["REMOTE_ADDR"]))]
if __name__ == "__main__":
    execute_from_command_line(sys.argv)
