"""The model of lm-evaluation-harness at the path that its command line names: `python -m axolotl_ivon.lm_eval`."""

from .integrations.lm_eval import IVONPosterior as IVONPosterior

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
