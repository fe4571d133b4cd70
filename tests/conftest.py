"""What every test process needs."""
import signal

# A shell that starts the tests in the background may have them ignore Ctrl+C, and what they start would inherit that:
# then no test of an interrupt could work.
signal.signal(signal.SIGINT, signal.default_int_handler)
