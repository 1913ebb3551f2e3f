"""A stand-in for torchvision, for this test on machines where there is no build of it for their torch.

MONAI Label 0.8.5 imports two functions of it at its start and calls them for other apps only.
"""
