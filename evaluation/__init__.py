"""How good and how fast a bundle is: dry run, report, scores, ablation."""
