"""CIFAR files in the formats in which they are published."""

import pickle


def write_binary(root, pixels, labels, classes):
    hundred = classes == 100
    folder = root / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    before = [[7] if hundred else []] * 14  # the coarse label comes first
    records = [bytes([*extra, label]) + row.tobytes() for extra, label, row in zip(before, labels, pixels, strict=True)]
    if hundred:
        (folder / "train.bin").write_bytes(b"".join(records[:10]))
        (folder / "test.bin").write_bytes(b"".join(records[10:]))
    else:
        for k in range(5):
            (folder / f"data_batch_{k + 1}.bin").write_bytes(b"".join(records[2 * k : 2 * k + 2]))
        (folder / "test_batch.bin").write_bytes(b"".join(records[10:]))
    names = "fine_label_names.txt" if hundred else "batches.meta.txt"
    (folder / names).write_text("\n".join(f"class{k}" for k in range(classes)) + "\n\n")
    return folder


def write_python(root, pixels, labels):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(0, 10)), ("test", slice(10, 14))):
        content = {"data": pixels[part], "fine_labels": labels[part].tolist(), "coarse_labels": [0], "filenames": ["x"]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{k}" for k in range(100)]}, protocol=2))
    return folder
