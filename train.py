"""Train, fit the posterior, sample with uncertainty, score and report: see README.md."""

from bayesdiff.commands.train import main

if __name__ == "__main__":
    main()
