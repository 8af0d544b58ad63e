"""Runs a command once on each host of a lab: `python tests/lab matrix.json -- command {rank} {address} {master}`.

`placed` in lab.py lists what is filled in, and lab.py says what a matrix holds. When all have ended, it ends with the
first status that is not 0. Ctrl-C reaches all of them.
"""

from __future__ import annotations

import argparse
import sys

from lab import LabError, lab, placed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/lab", description=__doc__.partition("\n")[0])
    parser.add_argument("matrix", help="a JSON file; lab.py says what may stand there")
    parser.add_argument("command", nargs="+", help="run once per host, with its {rank}, {address}, … filled in")
    args = parser.parse_args()
    try:
        with lab(args.matrix) as hosts:
            processes = [host.popen(words) for host, words in zip(hosts, placed(hosts, args.command), strict=True)]
            return next((status for process in processes if (status := process.wait()) != 0), 0)
    except (LabError, OSError) as error:
        sys.stderr.write(f"lab: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
