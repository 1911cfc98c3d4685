"""Times single operations on the device of this machine and writes them down."""
