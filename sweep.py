"""Run every combination of the given values: see README.md.

python sweep.py -m laplace.prior_precision=1,10,100
python sweep.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 seed=0,1,2,3
"""

from bayesdiff.commands.sweep import main

if __name__ == "__main__":
    main()
