package core

import (
	"bytes"
	"testing"
)

// TestEntries puts keys that were made one by one together, and uses them.
func TestEntries(t *testing.T) {
	p := small(t)
	sk := must(NewSecretKey(p))
	rotation := p.RotationElement(3)
	requests := []KeyRequest{{rotation, 1}, {0, p.MaxLevel()}, {must(p.ConjugationElement()), 2}}
	assembly, frame, err := NewAssembly(p, sk.ID, requests)
	if err != nil {
		t.Fatal(err)
	}
	ordered := EntryOrder(requests)
	if err := assembly.Add(must(sk.EvaluationKeyEntry(ordered[1]))); err == nil {
		t.Error("an entry out of order was taken")
	}
	if _, err := assembly.Finish(); err == nil {
		t.Error("keys without entries were finished")
	}
	for _, request := range ordered {
		entry := must(sk.EvaluationKeyEntry(request))
		if err := assembly.Add(entry); err != nil {
			t.Fatal(err)
		}
		frame = append(frame, entry...)
	}
	frame = append(frame, must(assembly.Finish())...)
	header := must(ParseHeader(frame[:HeaderSize], TypeEvaluationKeys, p))
	keys := must(Read(bytes.NewReader(frame[HeaderSize:]), frame[:HeaderSize], header, p)).(*EvaluationKeys)
	relin, galois := keys.Levels()
	if relin != p.MaxLevel() || len(galois) != 2 || galois[rotation] != 1 {
		t.Errorf("read back: %d, %v", relin, galois)
	}
	var written bytes.Buffer
	if err := keys.Write(&written); err != nil || !bytes.Equal(written.Bytes(), frame) {
		t.Error("written again, the bytes differ")
	}
	evaluator := must(NewEvaluator(p, keys))
	values := noise(p.Slots())
	ct := must(sk.Encrypt(must(p.Encode(values, 1, p.DefaultScale()))))
	rotated := must(must(sk.Decrypt(must(evaluator.Rotate(ct, 3, nil)))).Decode(0))
	if d := distance(append(values[3:], values[:3]...), rotated); d > 1e-4 {
		t.Errorf("rotated with such keys: error %g", d)
	}
	for _, bad := range [][]KeyRequest{{{2, 1}}, {{1, 1}}, {{rotation, 99}}, {{rotation, 1}, {rotation, 2}}} {
		if _, _, err := NewAssembly(p, sk.ID, bad); err == nil {
			t.Errorf("took %v", bad)
		}
	}
}
