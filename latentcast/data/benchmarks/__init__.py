"""The benchmark data sets, by name: one class each, imported when it is asked for."""

BENCHMARKS = {
    "moving_mnist": "latentcast.data.benchmarks.digits.MovingMNIST",
    "smmnist": "latentcast.data.benchmarks.digits.StochasticMovingMNIST",
    "kth": "latentcast.data.benchmarks.kth.KTH",
    "bair": "latentcast.data.benchmarks.bair.BAIR",
    "kinetics600": "latentcast.data.benchmarks.kinetics600.Kinetics600",
    "cityscapes": "latentcast.data.benchmarks.cityscapes.Cityscapes",
    "kitti": "latentcast.data.benchmarks.kitti.KITTI",
    "flow": "latentcast.data.benchmarks.flow.Flow",
    "folder": "latentcast.data.benchmarks.folder.Folder",
    "gym": "latentcast.data.benchmarks.gym.Gym",
}
