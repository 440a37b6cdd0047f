"""`python -m ringplane`"""

from ringplane.cli import main

main()
