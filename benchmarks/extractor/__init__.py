"""Whether a trained detail feature extractor is worth having: `python -m benchmarks.extractor`.

Four parts, each on photographs and each beside random extractors of the same shape:

    retrieval     do crops of one texture lie near each other in the features; a linear probe
    inversion     image -> features -> image, beside VGG-16's layout with an equal budget
    sensitivity   the loss's response to blur, noise, JPEG and ringing at one PSNR; its order of
                  levels
    fine-tuning   the demo's super-resolution, with trained and with random features

The figures go to benchmarks/results/<machine>-extractor.json, from which alone the tables, plots
and verdicts of docs/extractor.md are made.
"""
