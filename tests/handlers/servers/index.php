<?php
header("Content-Type: text/plain");
echo "$_SERVER[REMOTE_ADDR] $_SERVER[REMOTE_PORT]";
