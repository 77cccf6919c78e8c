"""What both sides of a consortium must agree on; imports neither `server` nor `client`."""
