"""`python -m moadapt`, also under `torchrun -m`, `deepspeed --module` and `accelerate launch -m`."""

from moadapt.cli import main

if __name__ == "__main__":
    main()
