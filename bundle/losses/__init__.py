from .location import BetaNLLLoss, FaithfulLoss, LocationLoss, LocationMSELoss

__all__ = ["BetaNLLLoss", "FaithfulLoss", "LocationLoss", "LocationMSELoss"]
