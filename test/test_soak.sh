#!/bin/sh
# Two hundred kills, a minute: see test/soak, which goes on for as long as it is told to.
exec "$(dirname "$0")/soak"
