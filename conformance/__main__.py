"""`python -m tracetorch.conformance NAME`: one of the subjects of this package as a child process."""

import sys

from tracetorch.conformance.server import main

if __name__ == "__main__":
    main(sys.argv[1:])
