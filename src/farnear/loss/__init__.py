"""Objectives: functions of tensors and an offset, which know no ranks and no models."""
