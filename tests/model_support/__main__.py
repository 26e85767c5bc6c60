import sys

from tests.model_support.matrix import main

main(sys.argv[1:])
