"""Networks: the detail feature extractor and the patch projection."""

from .detail_feature_extractor import DetailFeatureExtractor, InvertibleBlock
from .patch_projection import PatchProjection

__all__ = ["DetailFeatureExtractor", "InvertibleBlock", "PatchProjection"]
