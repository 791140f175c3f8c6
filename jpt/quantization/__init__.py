"""Making a quantized model: calibration, the choice of scales, and the report."""
