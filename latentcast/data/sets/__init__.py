"""The benchmark data sets, by name: one class each, imported when it is asked for."""

BENCHMARKS = {
    "moving_mnist": "latentcast.data.sets.moving_mnist.MovingMNIST",
    "smmnist": "latentcast.data.sets.moving_mnist.StochasticMovingMNIST",
    "kth": "latentcast.data.sets.kth.KTH",
    "bair": "latentcast.data.sets.bair.BAIR",
    "kinetics600": "latentcast.data.sets.kinetics600.Kinetics600",
    "cityscapes": "latentcast.data.sets.cityscapes.Cityscapes",
    "kitti": "latentcast.data.sets.kitti.KITTI",
    "flow": "latentcast.data.sets.flow.Flow",
    "folder": "latentcast.data.sets.folder.Folder",
    "gym": "latentcast.data.sets.gym.Gym",
}
